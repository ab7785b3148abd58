"""Names of columns: of logs and catalogues, and of those that the stage adds to its frames."""

ITEM_IDS = ("item_id", "item", "sku", "sku_id", "doc_id", "product_id")
USUAL = {
    "query": ("query", "anchor", "keyword", "search_query", "q"),
    "item": ITEM_IDS,
    "event": ("event", "event_type", "action", "type"),
    "time": ("time", "timestamp", "event_time", "ts", "day", "dt", "date"),
    "position": ("position", "pos", "rank"),
    "session": ("session", "session_id", "user", "user_id", "uid"),
}
"""What a column of the log means, to its usual names."""
CATALOGUE_IDS = ("item_id", "id", "_id", *ITEM_IDS[1:])

# of rows, named as no log names its own
KEY, QUERY, ITEM, DAY, POSITION, SESSION = "@key", "@query", "@item", "@day", "@position", "@session"
STAMP, REASON, RAW, CLOCK = "@stamp", "@reason", "@raw", "@clock"
FILE, FITS = "__file__", "__fits__"  # where a row is from, and whether it has as many fields as the header
# of pairs
IMPRESSIONS, EXAMINED, CLICKS, SCORE, GRADE = "impressions", "examined", "clicks", "score", "grade"
RATE, WEIGHT, LANGUAGE, TEXT, ANCHOR = "rate", "weight", "language", "text", "anchor"
QUERY_SEEN, ITEMS_SEEN = "query_seen", "items_seen"
