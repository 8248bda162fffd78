"""The data sets, one module each: `load` returns a `Dataset`, `prepare` makes what it reads."""
