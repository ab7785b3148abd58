"""What a kept column can be coloured by."""

from ebr_lib.visualize.columns import IDS, TITLES, column_of, usual_column


def kind_of(values) -> str:
    column = column_of("x", values)
    return "number" if column.is_number else "text" if column.groups is None else "label"


def test_numbers_are_a_scale_and_few_values_are_labels():
    assert kind_of([str(i / 7) for i in range(100)]) == "number"
    assert kind_of([*map(str, range(100)), None, ""]) == "number"  # some rows have none
    assert kind_of([str(i % 5) for i in range(100)]) == "label"  # stars
    assert kind_of([*map(str, range(100)), "n/a"]) == "text"
    assert kind_of([*map(str, range(100)), "inf"]) == "text"


def test_values_that_repeat_are_labels_and_others_texts():
    assert kind_of([f"brand {i % 40}" for i in range(100)]) == "label"
    assert kind_of([f"brand {i % 60}" for i in range(100)]) == "text"
    assert kind_of([f"brand {i}" for i in range(20)]) == "label"
    assert kind_of([f"brand {i % 1001}" for i in range(4000)]) == "text"
    assert kind_of([None, None]) == "label" and kind_of([]) == "label"


def test_ids_and_titles_go_by_their_usual_names():
    assert usual_column({"Title": 0, "item_id": 0, "ID": 0}, IDS) == "ID"
    assert usual_column({"price": 0, "商品名称": 0}, TITLES) == "商品名称"
    assert usual_column({"price": 0}, TITLES) is None
