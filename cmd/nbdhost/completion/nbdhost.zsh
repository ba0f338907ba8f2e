#compdef nbdhost nbdkit
# Completion of nbdhost's command lines in zsh:
#   nbdhost --completion=zsh >/usr/local/share/zsh/site-functions/_nbdhost

_nbdhost() {
    local line word help files=
    local -a open whole shownopen shown

    while IFS= read -r line; do
        word=${line%%$'\t'*}
        help=${line#*$'\t'}
        [[ $line == *$'\t'* ]] && help="$word  -- $help" || help=$word
        case $word in
            :files) files=1 ;;
            *[=.]) open+=("$word"); shownopen+=("$help") ;;
            *) whole+=("$word"); shown+=("$help") ;;
        esac
    done < <($words[1] --complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)

    (( $#whole )) && compadd -l -d shown -a whole
    (( $#open )) && compadd -S '' -l -d shownopen -a open
    if [[ -n $files ]]; then
        [[ $PREFIX == *=* ]] && compset -P '*='
        _files
    fi
}

if [[ $funcstack[1] == _nbdhost ]]; then _nbdhost "$@"; else compdef _nbdhost nbdhost nbdkit; fi
