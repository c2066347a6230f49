"""What the scripts of experiments/ share. The only folder of the package that knows ml_collections."""
