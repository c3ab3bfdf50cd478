"""Raw annotation files in, one folder of conversations out.

`build.build(recipe)` runs a build recipe; every module of `data_builders.sources` is a script of
its own. Nothing here imports torch or transformers, so a build runs on any machine that holds the
files. The package exports nothing at import: readers for Parquet and perceptual hashes load only
when a build needs them.
"""
