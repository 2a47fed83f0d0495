# shellcheck shell=bash
# Puts caches on scratch: home folders are small, and slow when many nodes read them at once.
export JAXDEEP_CACHE=${JAXDEEP_CACHE:-$SCRATCH/jaxdeep-cache}
export HF_HOME=${HF_HOME:-$JAXDEEP_CACHE/huggingface}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$JAXDEEP_CACHE/xla}
export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$JAXDEEP_CACHE/pip}
export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$JAXDEEP_CACHE/apptainer}
export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$JAXDEEP_CACHE/tmp}
export MPLCONFIGDIR=${MPLCONFIGDIR:-$JAXDEEP_CACHE/matplotlib}
export PYTHONUNBUFFERED=1
