"""Drop-ins for other toolboxes: their names and signatures around this package's losses."""
