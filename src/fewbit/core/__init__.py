"""The values that stages hand to each other, and the arithmetic on them: grids, choices, plans, widths. No I/O here."""
