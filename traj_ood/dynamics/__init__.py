"""The self-map f(z) = E(D(z)) under iteration: ``iterate``, ``Trajectory``, the Jacobian, the device's settings."""
