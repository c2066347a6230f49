"""Arrays in, arrays out. An axis name is all these functions know of a mesh."""
