"""Load on any OpenAI-compatible server: `eft bench serve`, from a checkout.

python -m benchmarks.serve --url http://127.0.0.1:8000 --requests 64 --concurrency 32
"""

import sys

from runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
