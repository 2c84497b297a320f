"""Files that both sides' pages serve: the theme, and htmx (hospitals have no CDN)."""

from pathlib import Path

FOLDER = Path(__file__).parent
