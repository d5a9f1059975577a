from salun_sd.cli.app import main

main()
