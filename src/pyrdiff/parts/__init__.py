"""What the plugin files share. A saved folder gets it joined into its own files, so that these stand alone."""
