"""One module a data set; each defines `SOURCE` and runs as `python -m data_builders.sources.NAME`.

Modules are found by name (`data_builders.recipe.source_names`), so adding a file adds a source.
"""
