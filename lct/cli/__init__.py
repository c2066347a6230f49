"""Code that the scripts of experiments/ share. No other folder of the package imports ml_collections."""
