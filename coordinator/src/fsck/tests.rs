//! Damage of every kind is found, and nothing that is whole is called damaged.
