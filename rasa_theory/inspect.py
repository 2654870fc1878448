"""python -m rasa_theory.inspect, or `rasa inspect`: sizes and spectra of updates, before a rank is chosen.

Two other things are called so, and this module stands in the way of neither. One is the function `rasa_theory.inspect`:
importing this module puts it in the function's place, so the module can be called like the function. The other is the
standard library's `inspect`, see below.
"""

import sys

if __name__ == "inspect":
    # The folder of the package is on sys.path, as in `python rasa_theory/extract.py`, and this file was taken for the
    # module of the standard library, which nearly everything imports. So that one is loaded in its place.
    import importlib.util
    import sysconfig

    spec = importlib.util.spec_from_file_location("inspect", sysconfig.get_path("stdlib") + "/inspect.py")
    if spec is None or spec.loader is None:
        raise ImportError("the module inspect of the standard library is not there")
    sys.modules["inspect"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["inspect"])
else:
    import functools
    import types
    from typing import Any

    from rasa_theory.commands.main import run

    class _Callable(types.ModuleType):
        """A module that is called like the function of the same name."""

        def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            from rasa_theory.inspection import inspect

            return inspect(*arguments, **options)

    main = functools.partial(run, "inspect")

    sys.modules[__name__].__class__ = _Callable

    if __name__ == "__main__":
        sys.exit(main())
