"""``python -m megamoe``."""

import sys

from megamoe.commands.main import main

sys.exit(main())
