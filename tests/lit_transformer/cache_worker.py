"""Run by test_data_cache.py: prepares texts one after another, and waits for a line before each is published."""

import sys

from lit_transformer.data.text import unfinished
from lit_transformer.data.text.cache import Recipe, prepare


def main(root, *texts):
    """Say what was found."""
    publish = unfinished._publish

    def waiting(partial, folder):
        print("waiting", flush=True)
        sys.stdin.readline()
        publish(partial, folder)

    unfinished._publish = waiting
    for text in texts:
        prepared = prepare(Recipe(text, None, None, 0.1, 0.1, "bpe", 290), root)
        print(prepared.folder.name, prepared.corpus_hash, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
