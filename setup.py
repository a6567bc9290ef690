"""Package map: `pipelines/`, `eval/`, `assets/` install as `erasure.pipelines`, `erasure.eval`, `erasure.assets`."""

from setuptools import find_packages, setup

BESIDE = {"erasure.pipelines": "pipelines", "erasure.eval": "eval", "erasure.assets": "assets"}

packages = find_packages(include=["erasure", "erasure.*"])
for name, folder in BESIDE.items():
    packages += [name, *(f"{name}.{child}" for child in find_packages(folder))]

setup(packages=packages, package_dir=BESIDE)
