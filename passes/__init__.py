"""The graph passes, one file each; `slimfit_fx.compiler.pipeline` has the list of them."""
