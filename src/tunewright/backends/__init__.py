"""Where a stage happens. `base` is the contract; each other module is one backend, found by entry point."""
