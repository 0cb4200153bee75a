"""``python -m layercut``: the same program as ``layercut``."""

from layercut.cli import main

raise SystemExit(main())
