"""`python -m inc_graph.cli`."""

import sys

from inc_graph.cli.app import main

sys.exit(main())
