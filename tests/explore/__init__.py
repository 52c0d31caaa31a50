"""A search for models that we get wrong: draws models and graphs, compresses them, and compares with eager."""
