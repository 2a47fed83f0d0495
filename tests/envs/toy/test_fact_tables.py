"""The tables of facts: each cell single-valued, plain, and told apart from every other answer."""

import collections
import csv
import importlib.resources

import pytest

FACTS = importlib.resources.files("jaxdeep") / "assets" / "facts"
COLUMNS = {
    "elements": ("name", "symbol", "number", "discoverer", "year"),
    "countries": ("name", "capital", "currency", "continent"),
    "moons": ("name", "planet", "discoverer", "year"),
    "states": ("name", "capital", "year", "nickname"),
}
CONTINENTS = {"Africa", "Asia", "Europe", "North America", "South America", "Oceania"}
PLANETS = {"Mars", "Jupiter", "Saturn", "Uranus", "Neptune", "Pluto"}


def rows(table: str) -> list[dict[str, str]]:
    with (FACTS / f"{table}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def column(table: str, name: str) -> list[str]:
    """The known values of one column, lower case, as a careless reader compares them."""
    return [row[name].lower() for row in rows(table) if row[name]]


def repeated(values: list[str]) -> set[str]:
    return {value for value, count in collections.Counter(values).items() if count > 1}


@pytest.mark.parametrize("table", COLUMNS)
def test_the_header_is_as_documented_and_every_row_fits_it(table):
    with (FACTS / f"{table}.csv").open(encoding="utf-8", newline="") as lines:
        header, *body = csv.reader(lines)
    assert tuple(header) == COLUMNS[table]
    assert [row for row in body if len(row) != len(header)] == []


@pytest.mark.parametrize("table", COLUMNS)
def test_values_are_plain_ascii_without_punctuation_that_would_split_them(table):
    for row in rows(table):
        for name, value in row.items():
            assert value.isascii() and value.isprintable(), (table, name, value)
            assert not set(value) & set(',;()[]"'), (table, name, value)
            assert value == " ".join(value.split()), (table, name, value)


@pytest.mark.parametrize("table", COLUMNS)
def test_names_are_short_and_tell_at_least_one_fact(table):
    for row in rows(table):
        assert 1 <= len(row["name"].split()) <= 3, row
        assert row["name"][0].isupper(), row
        assert any(value for name, value in row.items() if name != "name"), row


@pytest.mark.parametrize("table", COLUMNS)
def test_rows_are_complete_enough_to_ask_about(table):
    # Many elements have no single discoverer: a third is the sparsest column there is.
    for name in COLUMNS[table]:
        assert len(column(table, name)) >= 0.3 * len(rows(table)), (table, name)


def test_counts():
    assert len(rows("elements")) == 118
    assert len(rows("countries")) >= 150
    assert len(rows("states")) == 50
    assert len(rows("moons")) >= 40


def test_no_name_stands_for_two_things():
    assert repeated([name for table in COLUMNS for name in column(table, "name")]) == set()


def test_what_identifies_an_entity_identifies_only_one():
    assert repeated(column("elements", "symbol")) == set()
    assert repeated(column("countries", "capital") + column("states", "capital")) == set()
    assert repeated(column("states", "nickname")) == set()


def test_no_answer_is_the_name_of_another_entity():
    names = {name for table in COLUMNS for name in column(table, "name")}
    answers = {
        (table, name): set(column(table, name))
        for table, columns in COLUMNS.items()
        for name in columns
        if name not in ("name", "number", "year")
    }
    assert {where: values & names for where, values in answers.items() if values & names} == {}


def test_elements_are_in_order_with_symbols_of_the_right_shape():
    elements = rows("elements")
    assert [int(row["number"]) for row in elements] == list(range(1, 119))
    for row in elements:
        symbol = row["symbol"]
        assert symbol.isalpha() and 1 <= len(symbol) <= 2, row
        assert symbol == symbol.capitalize(), row


def test_symbols_start_as_their_names_do_but_for_those_from_other_languages():
    differ = {row["symbol"] for row in rows("elements") if row["symbol"][0] != row["name"][0]}
    assert differ == {"Na", "K", "Fe", "Ag", "Sn", "Sb", "W", "Au", "Hg", "Pb"}


def test_continents_and_planets_are_the_known_ones():
    assert {row["continent"] for row in rows("countries")} - {""} == CONTINENTS
    assert {row["planet"] for row in rows("moons")} == PLANETS


@pytest.mark.parametrize(
    ("table", "first", "last"),
    [("elements", 1669, 2010), ("moons", 1610, 2013), ("states", 1787, 1959)],
)
def test_years_are_plausible(table, first, last):
    for row in rows(table):
        if row["year"]:
            assert first <= int(row["year"]) <= last, row


def test_a_discovery_with_a_person_has_one_surname():
    for table in ("elements", "moons"):
        for row in rows(table):
            assert " and " not in row["discoverer"], row
            assert not any(character.isdigit() for character in row["discoverer"]), row


def test_every_state_has_a_capital_and_a_year():
    assert all(row["capital"] and row["year"] for row in rows("states"))


def test_a_capital_is_not_named_as_its_country():
    assert [row for row in rows("countries") if row["capital"] == row["name"]] == []
