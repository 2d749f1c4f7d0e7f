// Wxscan lets people log in to a web page by scanning a QR code with WeChat.
//
// It is one program with no database. It talks to one WeChat Official Account
// (公众号; a free test account, 测试号, is enough) and keeps everything in memory.
//
//	wxscan -demo     try it, with a simulated WeChat, on http://127.0.0.1:8080
//	wxscan           serve; the settings are in the environment
//	wxscan check     walk the set-up, and say what to mend and what to enter where
//	wxscan sign      print WeChat's requests, as curl lines
//	wxscan -h        the flags, and the environment variables behind them
//
// There are two ways to log in. In flow A the browser shows a parametric QR code
// made by WeChat, and WeChat pushes the scan to us. In flow B it shows the QR
// code of WeChat's web authorization page, and the phone brings us a code that
// says who it is. In both, the browser holds a secret ticket and asks
// /wechat/checklogin until somebody has scanned.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	readTimeout   = 20 * time.Second // of a whole request, its body included
	shutdownGrace = 5 * time.Second  // for the requests in flight
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "wxscan:", err)
		os.Exit(1)
	}
}

// run serves until ctx ends, or runs another command. It returns an error if it
// cannot start, or if check finds a fault.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		if err := command(ctx, args, getenv, stdout); !errors.Is(err, flag.ErrHelp) {
			return err
		}
		args = []string{"-h"}
	}
	config, err := parseConfig(args, getenv, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	listener, err := net.Listen("tcp", config.addr)
	if err != nil {
		return fmt.Errorf("ADDR (-addr): %w", err)
	}
	if config.demo {
		config.simulate(listener.Addr().(*net.TCPAddr))
	}
	server := newServer(config, log)
	log.Info("listening", "addr", listener.Addr().String(), "url", config.publicURL)
	if getenv("SESSION_SECRET") == "" && !config.demo {
		log.Warn("SESSION_SECRET is not set: a restart logs everybody out")
	}
	if config.demo {
		server.demo = newDemo(config, server.wechat.client, server.says)
		log.Warn("DEMO: WeChat is simulated, and ANYONE CAN LOG IN AS ANYONE", "open", config.publicURL+"/")
	} else {
		log.Info("to enter on the account's page", "interface_url", config.interfaceURL(), "authorization_domain", config.domain())
	}
	return serve(ctx, listener, server.routes(), log)
}

// serve answers requests until ctx ends, which wakes the parked polls. It
// returns once the requests in flight are answered, or shutdownGrace is over.
func serve(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           handler,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      maxWait + 15*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }() // ends with Shutdown
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		log.Warn("requests cut off at shutdown", "err", err)
		server.Close()
	}
	<-failed
	return nil
}

const usage = `wxscan: log in to a web page by scanning a QR code with WeChat

  wxscan -demo          try it on http://127.0.0.1:8080, with a simulated WeChat; needs nothing
  wxscan                serve; needs WECHAT_APPID, WECHAT_APPSECRET, WECHAT_TOKEN and PUBLIC_URL
  wxscan check [-json]  say what is wrong with the set-up, how to mend it, what to enter where
  wxscan sign [-public] [-ticket T -openid O [-event subscribe]]  WeChat's requests, as curl lines
  wxscan version

By environment only: WECHAT_AES_KEY (safe mode), SESSION_SECRET (sessions outlive a restart), and
WECHAT_API_BASE, WECHAT_OPEN_BASE, WECHAT_MP_BASE (in place of WeChat's hosts). Flags [as set now]:
`

// maxTTL is WeChat's own limit for the life of a QR code, 30 days.
const maxTTL = 2592000 * time.Second

// A config is the settings, checked.
type config struct {
	addr                      string
	publicURL                 string // http(s)://host[:port]
	appID, appSecret, token   string
	aesKey                    *aesKey       // nil in plain mode
	ttl                       time.Duration // whole seconds
	maxTickets                int
	maxSkew                   time.Duration  // of a push; 0 is any
	qrRate                    int            // QR codes a minute for one client; 0 is any
	trusted                   []netip.Prefix // proxies besides loopback
	sessionSecrets            []string
	sessionTTL                time.Duration // whole seconds
	confirm                   bool          // a scan must be confirmed on the phone
	allowedOrigins            []string
	verifyFile                string // MP_verify_xxx.txt, or none
	scope                     string
	apiBase, openBase, mpBase string // no trailing slash
	demo                      bool
}

// simulate fills in what depends on the address of a -demo. The program calls
// its simulator over loopback; phones reach it by the public URL.
func (c *config) simulate(listening *net.TCPAddr) {
	local := *listening
	if local.IP.IsUnspecified() {
		local.IP = net.IPv4(127, 0, 0, 1)
	}
	c.publicURL = cmp.Or(c.publicURL, "http://"+local.String())
	c.apiBase = "http://" + local.String() + "/demo"
	c.openBase, c.mpBase = c.publicURL+"/demo", c.publicURL+"/demo"
}

func commaSeparated(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// parseConfig reads the settings: secrets from the environment, the rest from
// flags, with the environment as their default. Its error is one line that
// names the setting, what is wrong with it and where to get it right; it is
// flag.ErrHelp after -h, whose answer goes to help.
func parseConfig(args []string, getenv func(string) string, help io.Writer) (config, error) {
	c := config{
		appID: getenv("WECHAT_APPID"), appSecret: getenv("WECHAT_APPSECRET"), token: getenv("WECHAT_TOKEN"),
		apiBase:  cmp.Or(getenv("WECHAT_API_BASE"), "https://api.weixin.qq.com"),
		openBase: cmp.Or(getenv("WECHAT_OPEN_BASE"), "https://open.weixin.qq.com"),
		mpBase:   cmp.Or(getenv("WECHAT_MP_BASE"), "https://mp.weixin.qq.com"),
	}
	flags := flag.NewFlagSet("wxscan", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var ttl, maxTickets, maxSkew, qrRate, trusted, sessionTTL, origins string
	setting := func(p *string, name, env, byDefault, usage string) {
		flags.StringVar(p, name, cmp.Or(getenv(env), byDefault), usage+" ("+env+")")
	}
	flags.BoolVar(&c.demo, "demo", false, "simulate WeChat; anyone can log in as anyone")
	setting(&c.addr, "addr", "ADDR", "", "listen `address`; by default :8080, with -demo 127.0.0.1:8080")
	setting(&c.publicURL, "url", "PUBLIC_URL", "", "how phones reach us: `http(s)://host[:port]`")
	setting(&ttl, "ttl", "TICKET_TTL", "5m", "life of a QR code, a `duration` of 1s to 720h")
	setting(&maxTickets, "max-tickets", "MAX_TICKETS", "100000", "`number` of live tickets before 503")
	setting(&maxSkew, "push-max-skew", "PUSH_MAX_SKEW", "10m", "`duration` a push may be old or early; 0 does not look")
	setting(&qrRate, "qr-rate", "QR_RATE", "60", "`number` of QR codes a minute for one client; 0 is no limit")
	setting(&trusted, "trusted-proxies", "TRUSTED_PROXIES", "", "`CIDRs`, besides loopback, whose X-Forwarded-For counts")
	setting(&sessionTTL, "session-ttl", "SESSION_TTL", "24h", "life of a session, a `duration` of 1m to 8760h")
	confirm, confirmErr := strconv.ParseBool(cmp.Or(getenv("CONFIRM"), "false"))
	flags.BoolVar(&c.confirm, "confirm", confirm, "a scan must be confirmed on the phone (CONFIRM)")
	setting(&origins, "allowed-origins", "ALLOWED_ORIGINS", "", "`origins` of other front ends, exact, comma-separated")
	setting(&c.verifyFile, "verify-file", "WECHAT_VERIFY_FILE", "", "`name` of the file that proves a domain, MP_verify_xxx.txt")
	setting(&c.scope, "scope", "WECHAT_SCOPE", "snsapi_base", "`scope`; snsapi_userinfo adds nickname and avatar")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(help, usage)
		flags.VisitAll(func(f *flag.Flag) {
			_, usage := flag.UnquoteUsage(f)
			fmt.Fprintf(help, "  -%-17s%s%s\n", f.Name, usage, strings.TrimSuffix(" ["+f.DefValue+"]", " []"))
		})
		return c, err
	case err != nil:
		return c, badFlag(err, flags)
	case flags.NArg() > 0:
		return c, fmt.Errorf("unknown argument %q; a command goes first (wxscan -h lists them)", flags.Arg(0))
	}
	if c.demo && c.appSecret != "" {
		return c, errors.New("WECHAT_APPSECRET is set: with -demo anyone can log in as anyone, which does not go with a real account; unset it, or leave out -demo")
	}
	if c.demo {
		c.appID, c.appSecret, c.token = cmp.Or(c.appID, "wx0123456789abcdef"), "simulated", cmp.Or(c.token, "simulated")
		c.addr = cmp.Or(c.addr, "127.0.0.1:8080")
	}
	c.addr = cmp.Or(c.addr, ":8080")
	for _, base := range []*string{&c.publicURL, &c.apiBase, &c.openBase, &c.mpBase} {
		*base = strings.TrimSuffix(*base, "/")
	}
	matches := func(pattern, value string) bool {
		ok, _ := regexp.MatchString(`^(`+pattern+`)$`, value)
		return ok
	}
	aesKey := getenv("WECHAT_AES_KEY")
	var errs [7]error
	c.aesKey, errs[0] = parseAESKey(aesKey)
	c.ttl, errs[1] = time.ParseDuration(ttl)
	c.maxTickets, errs[2] = strconv.Atoi(maxTickets)
	c.maxSkew, errs[3] = time.ParseDuration(maxSkew)
	c.qrRate, errs[4] = strconv.Atoi(qrRate)
	c.sessionTTL, errs[6] = time.ParseDuration(sessionTTL)
	secret := getenv("SESSION_SECRET")
	c.sessionSecrets = strings.Split(cmp.Or(secret, rand.Text()+rand.Text()), ",")
	c.allowedOrigins = commaSeparated(origins)
	for _, cidr := range commaSeparated(trusted) {
		prefix, err := netip.ParsePrefix(cidr)
		c.trusted, errs[5] = append(c.trusted, prefix.Masked()), cmp.Or(errs[5], err)
	}
	const (
		origin  = `https?://([0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?`
		account = "on the account's page, for a test account https://mp.weixin.qq.com/debug/cgi-bin/sandbox?t=sandbox/login"
		base    = "http(s)://host[:port][/path], or unset for WeChat's own"
	)
	for _, setting := range []struct {
		name, value string
		ok          bool
		mustBe      string
	}{
		{"WECHAT_APPID", c.appID, matches(`wx[0-9A-Za-z]+`, c.appID), "the appID (wx and letters and digits) " + account},
		{"WECHAT_APPSECRET", c.appSecret, matches(`[0-9A-Za-z]+`, c.appSecret), "the appsecret (letters and digits) " + account},
		{"WECHAT_TOKEN", c.token, matches(`[0-9A-Za-z]{3,32}`, c.token), "the Token (3-32 letters and digits) that you make up and type into the interface configuration (接口配置信息) " + account},
		{"WECHAT_AES_KEY", aesKey, aesKey == "" || errs[0] == nil, "the EncodingAESKey (43 letters and digits) " + account + ", or unset for plain mode"},
		{"PUBLIC_URL (-url)", c.publicURL, matches(origin, c.publicURL) || c.demo && c.publicURL == "", "http(s)://host[:port] without a path, where phones and WeChat reach this server, such as your ngrok address"},
		{"TICKET_TTL (-ttl)", ttl, errs[1] == nil && c.ttl%time.Second == 0 && c.ttl > 0 && c.ttl <= maxTTL, "a duration such as 5m, whole seconds, from 1s to 720h"},
		{"MAX_TICKETS (-max-tickets)", maxTickets, errs[2] == nil && c.maxTickets > 0, "a number from 1"},
		{"PUSH_MAX_SKEW (-push-max-skew)", maxSkew, errs[3] == nil && c.maxSkew >= 0, "a duration such as 10m, or 0"},
		{"QR_RATE (-qr-rate)", qrRate, errs[4] == nil && c.qrRate >= 0 && c.qrRate <= 1000, "a number from 0 to 1000"},
		{"TRUSTED_PROXIES (-trusted-proxies)", trusted, errs[5] == nil, "CIDRs such as 10.0.0.0/8,fd00::/8"},
		{"SESSION_SECRET", secret, !slices.ContainsFunc(c.sessionSecrets, func(s string) bool { return len(s) < 32 }), "at least 32 bytes, or several such, comma-separated: openssl rand -hex 32 makes one"},
		{"SESSION_TTL (-session-ttl)", sessionTTL, errs[6] == nil && c.sessionTTL%time.Second == 0 && c.sessionTTL >= time.Minute && c.sessionTTL <= 8760*time.Hour, "a duration such as 24h, whole seconds, from 1m to 8760h"},
		{"CONFIRM (-confirm)", getenv("CONFIRM"), confirmErr == nil, "true or false"},
		{"ALLOWED_ORIGINS (-allowed-origins)", origins, !slices.ContainsFunc(c.allowedOrigins, func(o string) bool { return !matches(origin, o) }), "exact origins such as https://www.example.com, comma-separated; * is none"},
		{"WECHAT_VERIFY_FILE (-verify-file)", c.verifyFile, matches(`(MP_verify_[0-9A-Za-z]+\.txt)?`, c.verifyFile), "the name of the file from the account's page, MP_verify_xxx.txt"},
		{"WECHAT_SCOPE (-scope)", c.scope, matches(`snsapi_(base|userinfo)`, c.scope), "snsapi_base or snsapi_userinfo"},
		{"WECHAT_API_BASE", c.apiBase, matches(origin+`(/[!-~]*)?`, c.apiBase), base},
		{"WECHAT_OPEN_BASE", c.openBase, matches(origin+`(/[!-~]*)?`, c.openBase), base},
		{"WECHAT_MP_BASE", c.mpBase, matches(origin+`(/[!-~]*)?`, c.mpBase), base},
	} {
		switch {
		case setting.ok:
		case setting.value == "":
			return c, fmt.Errorf("%s is not set: it must be %s; without an account, try wxscan -demo", setting.name, setting.mustBe)
		default:
			return c, fmt.Errorf("%s is malformed: it must be %s; without an account, try wxscan -demo", setting.name, setting.mustBe)
		}
	}
	return c, nil
}
