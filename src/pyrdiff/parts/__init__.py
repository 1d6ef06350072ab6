"""What plugin files share. A saved folder gets it joined into each of them (see `pyrdiff.hub.standalone`)."""
