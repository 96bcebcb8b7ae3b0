"""Function calls: how models write them, grammars that keep them well formed, and the parser that reads them."""
