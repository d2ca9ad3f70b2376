"""`python -m runtime.trainer.launched`: see `agent.main`."""

import sys

from runtime.trainer.launched.agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
