"""Parts of this toolkit in the shape that other libraries expect; none is imported here."""
