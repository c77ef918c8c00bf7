"""A controller in the manner of HiMA's Budgeter: bytes go where they save most, as a convex program says."""
