"""Tables to train on, from the translations inside an installed Django: real text, which nothing downloads.

    pip install django
    python examples/django_translations.py --to django_tables

writes `languages/{train,validation,test}.csv` with the columns `text` and `language`, and
`pairs/{train,validation,test}.jsonl`, an object a line, with the keys `en` and `es`. Messages are split by what they
say in English, letter case and punctuation aside: no message is in two splits, in whatever language. `--packages`
adds other installed packages that have compiled translations; mind their licences. Django's is BSD-3-Clause, that of
the code and, as they say themselves, of the translations.
"""

import argparse
import csv
import gettext
import hashlib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

SPLITS = {"train": 80, "validation": 10, "test": 10}  # percent of the messages
LANGUAGES = ["ca", "cs", "da", "de", "en", "es", "fr", "gl", "it", "nb", "nl", "nn", "pl", "pt", "ro", "sk", "sl", "sv"]
"""With many next of kin among them."""

LONGEST = 100
"""Characters of a message to translate: the few that are longer make most of the padding."""

Catalogs = dict[str, set[tuple[str, str]]]
"""By language, what messages say in English, and what in the language."""

Table = dict[str, list[tuple[str, str]]]
"""By split, the rows."""


def read(packages: Iterable[str]) -> Catalogs:
    """What installed packages, which are not imported, have translated; of plurals the first form.

    Raises:
        SystemExit: If a package is not installed, or has no compiled translations.
    """
    found: Catalogs = defaultdict(set)
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(f"expected an installed package, got {package!r}: pip install {package}")
        folders = spec.submodule_search_locations or ()
        paths = sorted(path for folder in folders for path in Path(folder).glob("**/LC_MESSAGES/*.mo"))
        if not paths:
            raise SystemExit(f"expected a package with compiled translations, got {package!r}, which has none")
        for path in paths:
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # nothing public lists what is in it
            for key, text in catalog.items():
                english, form = (key, 0) if isinstance(key, str) else key
                english = english.rpartition("\x04")[2]  # after its context, if it has one
                if form == 0 and english and text != english:
                    found[path.parts[-3]].add((english, text))
    return found


def split_of(english: str) -> str:
    """Which split a message is in: a hash of its words says so.

    Example:
        >>> split_of("Delete?") == split_of("delete")
        True
    """
    words = " ".join(re.findall(r"\w+", english.casefold()))
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 100
    return "train" if place < SPLITS["train"] else "validation" if place < 100 - SPLITS["test"] else "test"


def languages_table(catalogs: Catalogs, languages: Iterable[str]) -> Table:
    """Texts and their languages. A text is there once, in the first of its splits; one of two languages is left out.

    Example:
        >>> catalogs = {"de": {("Yes", "Ja"), ("No", "Nein")}, "nl": {("Yes", "Ja"), ("No", "Nee")}}
        >>> sum(languages_table(catalogs, ["de", "nl"]).values(), [])
        [('Nein', 'de'), ('Nee', 'nl')]
    """
    owners: dict[str, set[str]] = defaultdict(set)
    splits: dict[str, set[str]] = defaultdict(set)
    english = {(message, message) for language in languages for message, _ in catalogs.get(language, ())}
    for language in languages:
        for message, text in english if language == "en" else catalogs[language]:
            owners[text].add(language)
            splits[text].add(split_of(message))
    rows = sorted((min(found), text) for text, found in owners.items() if len(found) == 1)
    first = {text: next(split for split in SPLITS if split in found) for text, found in splits.items()}
    return {split: [(text, language) for language, text in rows if first[text] == split] for split in SPLITS}


def pairs_table(catalogs: Catalogs, language: str) -> Table:
    """Messages in English and in another language, but for long ones."""
    rows = sorted(row for row in catalogs[language] if max(map(len, row)) <= LONGEST)
    return {split: [row for row in rows if split_of(row[0]) == split] for split in SPLITS}


def main() -> None:
    """Write the tables, and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("django_tables"), help="folder to write to")
    parser.add_argument("--packages", nargs="+", default=["django"], help="packages to read from")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="languages to tell apart; en is English")
    parser.add_argument("--pair", default="es", help="language to translate English to")
    options = parser.parse_args()
    catalogs = read(options.packages)
    if unknown := sorted({*options.languages, options.pair} - {"en", *catalogs}):
        raise SystemExit(f"expected languages from {' '.join(sorted(catalogs))}, got {unknown[0]!r}")
    for name in [name for package in options.packages for name in packages_distributions().get(package, ())]:
        about = metadata(name)
        print(f"{about['Name']} {about['Version']}, licence {about['License-Expression'] or about['License']}")
    texts = languages_table(catalogs, options.languages)
    for split, rows in texts.items():
        path = options.to / "languages" / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "language"), *rows])
        print(f"{path}: {len(rows):,} texts in {len(set(dict(rows).values()))} languages")
    for split, rows in pairs_table(catalogs, options.pair).items():
        path = options.to / "pairs" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"en": english, options.pair: text}, ensure_ascii=False) for english, text in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(rows):,} pairs")


if __name__ == "__main__":
    main()
