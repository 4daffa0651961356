"""The HTTP layer that v1 and v2 share: middleware, authentication, limits and bodies."""
