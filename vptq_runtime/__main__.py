"""`python -m vptq_runtime` is vptq-run."""

import sys

from vptq_runtime.commands.run import main

sys.exit(main())
