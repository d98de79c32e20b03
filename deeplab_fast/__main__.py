"""``python -m deeplab_fast`` is the command ``deeplab-fast``."""

import sys

from .cli import main

sys.exit(main())
