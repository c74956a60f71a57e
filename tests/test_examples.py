"""The examples on real data: what the script makes of translations, and that its recipes run."""

import csv
import doctest
import importlib.util
import inspect
import json
import re
import shlex
import struct
import sys
from pathlib import Path

import pytest

import lit_transformer
from lit_transformer.cli import main

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "examples" / "django_translations.py"
PAGES = [REPOSITORY / "docs" / name for name in ("README.md", "real_data.md")]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = sorted({line.strip() for line in TEXT.splitlines() if line.startswith("    python cli.py ")})
SPLITS = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("django_translations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tables(example, folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(SCRIPT), "--to", "django_tables", *words])
        example.main()
    return folder / "django_tables"


@pytest.fixture(scope="module")
def tables(example, tmp_path_factory):
    pytest.importorskip("django")
    return make_tables(example, tmp_path_factory.mktemp("tables"))


def read_texts(tables, split):
    with (tables / "languages" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["language"]) for row in csv.DictReader(file)]


def read_pairs(tables, split):
    lines = (tables / "pairs" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["en"], row["es"]) for row in map(json.loads, lines)]


def write_mo(path, messages):
    """A compiled catalog, as GNU gettext's manual describes it: a header, two tables of length and place, strings."""
    path.parent.mkdir(parents=True)
    strings = [[text.encode() for text in pair] for pair in sorted(messages.items())]
    places, body, start = [], b"", 28 + 16 * len(strings)
    for column in zip(*strings, strict=True):
        for text in column:
            places.append(struct.pack("<2I", len(text), start + len(body)))
            body += text + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(strings), 28, 28 + 8 * len(strings), 0, 0)
    path.write_bytes(header + b"".join(places) + body)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package nobody has heard of, with the catalog of one language."""
    folder = tmp_path / "somebodys_package"
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
        "Yes": "Ja",
        "OK": "OK",
        "month\x04May": "Mai",
        "%d day\0%d days": "%d Tag\0%d Tage",
    }
    write_mo(folder / "locale" / "de" / "LC_MESSAGES" / "django.mo", messages)
    (folder / "__init__.py").write_text("raise AssertionError('it is not imported')")
    (tmp_path / "without_any.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def test_what_is_read_of_a_catalog(example, package):
    assert example.read([package]) == {"de": {("Yes", "Ja"), ("May", "Mai"), ("%d day", "%d Tag")}}


def test_what_cannot_be_read_is_named(example, package, tmp_path):
    with pytest.raises(SystemExit, match="expected an installed package, got 'no_such_package': pip install no_such_"):
        example.read(["no_such_package"])
    with pytest.raises(SystemExit, match="got 'without_any', which has none"):
        example.read(["without_any"])
    with pytest.raises(SystemExit, match="expected languages from de, got 'ca'"):
        make_tables(example, tmp_path, "--packages", package)


def test_a_text_is_in_one_split_and_of_one_language(example):
    by_split = {split: next(w for w in map(str, range(999)) if example.split_of(w) == split) for split in SPLITS}
    train, validation, test = by_split.values()
    catalogs = {
        "de": {(train, "ja"), (validation, "ja"), (validation, "nein"), (test, "gut")},
        "nl": {(test, "goed"), (train, "gut")},
    }
    found = example.languages_table(catalogs, ["de", "nl", "en"])
    assert found == {
        "train": [("ja", "de"), (train, "en")],
        "validation": [("nein", "de"), (validation, "en")],
        "test": [(test, "en"), ("goed", "nl")],
    }
    assert example.split_of(" Yes, NO") == example.split_of("yes no.")


def test_the_examples_in_its_docstrings_hold(example):
    found = doctest.testmod(example)
    assert (found.failed, found.attempted) == (0, 3)


def test_the_tables_hold_what_django_says(example, tables):
    """Entries of one line in the sources of the catalogs, which the script does not read."""
    import django

    source = Path(django.__file__).parent / "conf" / "locale" / "es" / "LC_MESSAGES" / "django.po"
    entries = re.findall(r'(?<!msgctxt)\n\nmsgid "([^"\\]+)"\nmsgstr "([^"\\]+)"(?=\n\n)', source.read_text("utf-8"))
    pairs = {pair for split in SPLITS for pair in read_pairs(tables, split)}
    wanted = {pair for pair in entries if pair[0] != pair[1] and max(map(len, pair)) <= example.LONGEST}
    assert len(wanted) > 100
    assert wanted <= pairs
    assert {len(read_pairs(tables, split)) > size for split, size in zip(SPLITS, (550, 50, 50), strict=True)} == {True}


def test_no_text_is_on_two_sides(tables):
    seen = {}
    for split in SPLITS:
        rows = read_texts(tables, split)
        assert len(rows) > (9000 if split == "train" else 1000)
        assert len({language for _, language in rows}) == 18
        for text, _ in rows:
            assert text not in seen, (text, split, seen[text])
            seen[text] = split
    sides = {}
    for split in SPLITS:
        for english, _ in read_pairs(tables, split):
            words = " ".join(re.findall(r"\w+", english.casefold()))
            assert sides.setdefault(words, split) == split
            assert seen.get(english, split) == split  # where it is a text itself


@pytest.fixture
def cli(tables, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "django_tables").symlink_to(tables)

    def run(*words):
        main(list(words))
        return capsys.readouterr().out

    return run


FAST = [
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=3",
    "--trainer.limit_val_batches=1",
    "--data.init_args.batch_size=8",
    "--run=a",
]


def test_languages_are_learned_told_apart(cli, tables):
    out = cli("fit", "--config", str(REPOSITORY / "examples" / "languages.yaml"), *FAST)
    sizes = [f"{split} {len(read_texts(tables, split)):,}" for split in SPLITS]  # "None" is a text, too
    assert ", ".join(sizes) in out
    assert "18 classes" in out
    assert re.search(r"accuracy 0\.\d+; the most frequent class: 0\.0\d", out)
    assert re.search(r"accuracy 0\.\d+; a bag of words: 0\.7\d", out)
    cli("predict", "--run=a", "--ckpt_path=last")
    with Path("runs/a/predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(read_texts(tables, "test"))
    assert {row["label"] for row in rows} <= {language for _, language in read_texts(tables, "test")}


def test_a_translation_is_learned(cli, tables):
    config = str(REPOSITORY / "examples" / "translation.yaml")
    out = cli("fit", "--config", config, *FAST, "--model.init_args.max_new_tokens=4")
    assert ", ".join(f"{split} {len(read_pairs(tables, split)):,}" for split in SPLITS) in out
    assert "; guessing tokens by their frequency: " in out
    assert "The first 5 targets of the validation data, and what the model writes:" in out
    assert read_pairs(tables, "validation")[1][1] in out


def test_the_python_of_the_page_runs(tables, monkeypatch, capsys):
    monkeypatch.chdir(tables.parent)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "real_data.md", "exec"), {"__name__": "page"})
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {split: float(value) > 0.85 for split, value in said.items()} == {"validation": True, "test": True}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_parse(command, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command.partition(" #")[0])[2:]
    if words[0] == "fit" and "--ckpt_path" not in words:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0
    else:
        with pytest.raises(SystemExit):
            main([*words, *(["--root"] if words[0] == "generate" else ["--trainer.default_root_dir"]), "nowhere"])
        assert "nowhere/" in capsys.readouterr().err  # understood, but there is no such run here


def test_the_pages_name_what_exists():
    names = re.findall(r"`(?:--)?(data|model)\.init_args\.([a-z_]+)", TEXT)
    known = {
        "data": [lit_transformer.ClassificationData, lit_transformer.SequencePairData],
        "model": [lit_transformer.LitClassifier, lit_transformer.LitSeq2Seq],
    }
    for section, name in names:
        assert any(name in inspect.signature(part).parameters for part in known[section]), name
    assert len(names) > 5
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), link
    index = PAGES[0].read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page == PAGES[0] or f"]({page.name})" in index, page.name
