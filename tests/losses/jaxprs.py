"""What arrays a program makes, inner programs included."""

import jax
import jax.numpy as jnp


def shapes(f, *args, of=""):
    """The shapes of all float32 arrays that f computes, or of those that the primitive `of` does."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                if getattr(var.aval, "dtype", None) == jnp.float32 and of in ("", eqn.primitive.name):
                    yield var.aval.shape
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return set(walk(jax.make_jaxpr(f)(*args).jaxpr))


def largest(f, *args):
    """Elements of the largest of them."""
    sizes = [jax.ShapeDtypeStruct(shape, jnp.float32).size for shape in shapes(f, *args)]
    return max(sizes)
