#!/usr/bin/env bash
# Sourced first by the others: --help is the comment at the top of the script that was called, before anything is done.
called=$0
if [ ! -f "$called" ]; then called=$OLDPWD/$0; fi # we are in the root by now
for word in "$@"; do
  if [ "$word" = --help ]; then
    sed -n -e '/^#!/d' -e '/^# shellcheck/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$called"
    exit
  fi
done
