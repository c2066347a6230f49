"""Pure functions of arrays. All that they know of a mesh is the name of an axis."""
