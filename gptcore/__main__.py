"""python -m gptcore is the command gptcore."""

import sys

from gptcore.cli import main

sys.exit(main())
