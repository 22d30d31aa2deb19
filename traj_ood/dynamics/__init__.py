"""Iteration of the self-map f(z) = E(D(z)): ``iterate``, ``Trajectory``, Jacobians, and device settings."""
