"""The shipped workflows: changed to run on small models, laid out, pictured."""
