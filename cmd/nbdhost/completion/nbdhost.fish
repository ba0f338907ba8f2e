# Completion of nbdhost's command lines in fish:
#   nbdhost --completion=fish >~/.config/fish/completions/nbdhost.fish

function __nbdhost_complete
    set -l words (commandline --tokenize --cut-at-cursor --current-process)
    set -l current (commandline --current-token --cut-at-cursor)
    for line in ($words[1] --complete -- $words[2..-1] "$current" 2>/dev/null)
        if test "$line" = :files
            set -l key (string match --regex '^[^=]*=' -- "$current")
            for file in (__fish_complete_path (string replace --regex '^[^=]*=' '' -- "$current"))
                echo "$key$file"
            end
        else
            echo $line
        end
    end
end

complete --command nbdhost --no-files --arguments '(__nbdhost_complete)'
complete --command nbdkit --no-files --arguments '(__nbdhost_complete)'
