"""Graph passes: one rewrite a file, shipped as `snncompile.passes`."""

if __name__ != "snncompile.passes":
    # Imported from the repository root, this folder would be a second copy of every pass, with classes that no
    # `isinstance` check and no registry of the installed package knows.
    raise ImportError(f"import snncompile.passes, not {__name__}: the folder passes/ is only where its source lives")
