# SPDX-License-Identifier: Apache-2.0
"""`python -m uncomp` is the console script `uncomp`."""

import sys

from uncomp.cli import main

sys.exit(main())
