"""The ground of the service: errors, settings, request parameters, schema, budgets."""
