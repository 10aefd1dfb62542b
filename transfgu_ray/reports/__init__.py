"""Numbers told to people: pages, tables and figures, made from finished files."""
