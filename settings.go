package main

import (
	"cmp"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"flag"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A config is the settings, checked.
type config struct {
	addr                      *net.TCPAddr
	publicURL                 string // http(s)://host[:port]
	appID, appSecret, token   string
	aesKey                    *aesKey       // nil in plain mode
	ttl                       time.Duration // whole seconds
	maxTickets                int
	maxSkew                   time.Duration  // how far off a push may be; 0: any
	qrRate                    int            // QR codes a minute for one client; 0: no limit
	trusted                   []netip.Prefix // proxies besides loopback
	sessionSecrets            []string
	forgetful                 bool          // the session's secret is random, and lost with the program
	sessionTTL                time.Duration // whole seconds
	confirm                   bool          // a scan must be confirmed on the phone
	flows                     []string      // what the login page offers, in order
	account                   string        // 微信号 or gh_…, whose own QR code flow C shows
	siteName                  string        // for people; "" is the host of publicURL
	allowedOrigins            []string
	verifyFile                string         // MP_verify_xxx.txt, or none
	metricsToken              string         // opens /metrics
	apiToken                  string         // opens wechat-server's protocol
	redisURL                  *url.URL       // nil: tickets are kept in memory
	redisCA                   *x509.CertPool // nil: the system's
	redisPrefix               string
	tlsCert, tlsKey           string // files, or none
	logLevel                  slog.Level
	logFormat                 string // text or json
	scope                     string
	apiBase, openBase, mpBase string // no trailing slash
	demo                      bool
}

// simulate sets what depends on where a -demo listens. The program calls its
// simulator over loopback; phones reach it by the public URL.
func (c *config) simulate(listening *net.TCPAddr) {
	local := fromHere(listening)
	c.publicURL = cmp.Or(c.publicURL, local)
	c.apiBase = local + "/demo"
	c.openBase, c.mpBase = c.publicURL+"/demo", c.publicURL+"/demo"
}

// fromHere returns the URL by which this computer reaches what listens at addr.
func fromHere(addr *net.TCPAddr) string {
	local := *addr
	if local.IP == nil || local.IP.IsUnspecified() {
		local.IP = net.IPv4(127, 0, 0, 1)
	}
	return "http://" + local.String()
}

// interfaceURL is where WeChat is to send its pushes.
func (c *config) interfaceURL() string { return c.publicURL + "/wechat/message" }

// domain is the bare host that the authorize page may send phones back to.
func (c *config) domain() string { return originOf(c.publicURL).Hostname() }

// shortToken tells whether the Token could be guessed by asking.
func (c *config) shortToken() bool { return len(c.token) < 16 }

// originOf returns the scheme and host of an address, without the rest, which may hold
// secrets. It is never nil.
func originOf(address string) *url.URL {
	u, err := url.Parse(address)
	if err != nil {
		return new(url.URL)
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}
}

// A setting comes from its flag, if it has one, else from the environment, else
// from the file of -env.
type setting struct {
	env, flag string
	kind      valueKind
	byDefault string
	set       func(value string) bool // false if the value is malformed; it is never empty
	english   string                  // what it must be
	chinese   string
}

type valueKind int

const (
	open   valueKind = iota
	secret           // never in an error, so it has no flag
	yesNo            // the flag alone means yes
)

// complaint is the line about a value that the setting does not take.
func (s *setting) complaint(l language, value string) string {
	name := s.env
	if s.flag != "" {
		name += " (-" + s.flag + ")"
	}
	must := name + l.choose(": must be "+s.english, "：应为"+s.chinese)
	switch {
	case value == "":
		return must + l.choose(", but is not set", "，但未设置")
	case s.kind == secret:
		return must + l.choose(", got something else, which is not shown here",
			"，实际不符（此处不显示其值）")
	}
	return must + l.sprintf(", got %q", "，实际为 %q", value)
}

// parsed returns the set of a setting: it parses a value into p.
func parsed[T any](p *T, parse func(string) (T, error)) func(string) bool {
	return func(value string) bool {
		var err error
		*p, err = parse(value)
		return err == nil
	}
}

// within is parsed, for a whole number of units from least to most.
func within[T int | time.Duration](p *T, parse func(string) (T, error), unit, least, most T) func(string) bool {
	return func(value string) bool { return parsed(p, parse)(value) && *p%unit == 0 && *p >= least && *p <= most }
}

// listed is parsed, for comma-separated items.
func listed[T any](p *[]T, parse func(string) (T, error)) func(string) bool {
	return func(value string) bool {
		for item := range strings.SplitSeq(value, ",") {
			v, err := parse(item)
			if err != nil {
				return false
			}
			*p = append(*p, v)
		}
		return true
	}
}

var errMalformed = errors.New("malformed")

// like returns a parser that takes any text that matches the whole pattern.
func like(pattern string) func(string) (string, error) {
	return func(value string) (string, error) {
		if ok, _ := regexp.MatchString("^("+pattern+")$", value); !ok {
			return "", errMalformed
		}
		return value, nil
	}
}

// originPattern is that of scheme://host[:port].
const originPattern = `https?://([0-9A-Za-z.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?`

// parseOrigin returns an origin as browsers write it: in lower case, an IPv6 address
// at its shortest, and without the default port of its scheme.
func parseOrigin(value string) (string, error) {
	value, err := like(originPattern)(strings.ToLower(value))
	u, noURL := url.Parse(value)
	if err != nil || noURL != nil {
		return "", errMalformed
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && ip.Is6() {
		value = strings.Replace(value, u.Hostname(), ip.String(), 1)
	}
	return strings.TrimSuffix(value, map[string]string{"http": ":80", "https": ":443"}[u.Scheme]), nil
}

func parseAddr(value string) (*net.TCPAddr, error) { return net.ResolveTCPAddr("tcp", value) }

func parseYesNo(value string) (bool, error) {
	switch strings.ToLower(value) {
	case "yes", "on", "true", "1", "y", "t":
		return true, nil
	case "no", "off", "false", "0", "n", "f":
		return false, nil
	}
	return false, errMalformed
}

// settings returns all settings, bound to c.
func (c *config) settings() []setting {
	const base = originPattern + `(/[!-~]*)?`
	text := func(p *string, pattern string) func(string) bool { return parsed(p, like(pattern)) }
	link := func(p *string, pattern string) func(string) bool {
		return func(value string) bool { return text(p, pattern)(strings.TrimSuffix(value, "/")) }
	}
	return []setting{
		{"WECHAT_APPID", "", open, "", text(&c.appID, `wx[0-9A-Za-z]+`),
			"the appID on the account's page: wx, then letters and digits",
			"公众号页面上的 appID：wx 加字母和数字"},
		{"WECHAT_APPSECRET", "", secret, "", text(&c.appSecret, `[0-9A-Za-z]+`),
			"the appsecret on the account's page: letters and digits",
			"公众号页面上的 appsecret：字母和数字"},
		{"WECHAT_TOKEN", "", secret, "", text(&c.token, `[0-9A-Za-z]{3,32}`),
			"3 to 32 letters and digits that you make up, as in 接口配置信息",
			"自定义的 Token，3 至 32 位字母或数字，与接口配置信息中一致"},
		{"WECHAT_AES_KEY", "", secret, "", parsed(&c.aesKey, parseAESKey),
			"the EncodingAESKey: 43 letters and digits; unset: plain mode",
			"安全模式的 EncodingAESKey，43 位字母或数字；不设则为明文模式"},
		{"SESSION_SECRET", "", secret, "", listed(&c.sessionSecrets, like(`(?s).{32,}`)),
			"32 bytes or more to sign sessions with; several: by commas",
			"会话签名密钥，至少 32 字节；多个以逗号分隔"},
		{"METRICS_TOKEN", "", secret, "", text(&c.metricsToken, `[!-~]+`),
			"what opens /metrics, ASCII without spaces; unset: it stays shut",
			"访问 /metrics 的凭证，无空格的 ASCII 字符；不设则不开放"},
		{"API_TOKEN", "", secret, "", text(&c.apiToken, `[!-~]{16,}`),
			"16 characters or more, for clients of wechat-server's protocol",
			"wechat-server 协议的凭证，至少 16 个字符；不设则不开放"},
		{"WECHAT_API_BASE", "", open, "https://api.weixin.qq.com", link(&c.apiBase, base),
			"http(s)://host[:port][/path] in place of the API",
			"代替微信接口的地址 http(s)://域名[:端口][/路径]"},
		{"WECHAT_OPEN_BASE", "", open, "https://open.weixin.qq.com", link(&c.openBase, base),
			"http(s)://host[:port][/path] in place of the authorize page",
			"代替微信授权页的地址 http(s)://域名[:端口][/路径]"},
		{"WECHAT_MP_BASE", "", open, "https://mp.weixin.qq.com", link(&c.mpBase, base),
			"http(s)://host[:port][/path] in place of the pictures",
			"代替微信二维码图片的地址 http(s)://域名[:端口][/路径]"},
		{"REDIS_URL", "", secret, "", parsed(&c.redisURL, parseRedisURL),
			"redis[s]://[user:password@]host[:port][/db] of a shared Redis; unset: memory",
			"多个实例共用的 Redis（7.0 以上）redis[s]://[用户:密码@]主机[:端口][/库]；" +
				"不设则用内存"},
		{"REDIS_CA", "", open, "", parsed(&c.redisCA, readCA),
			"the file of the certificates that rediss:// trusts; unset: the system's",
			"验证 rediss:// 所用的 CA 证书文件；不设则用系统的"},
		{"REDIS_PREFIX", "redis-prefix", open, "wxscan:", text(&c.redisPrefix, `[!-~]{0,100}`),
			"what our keys in Redis begin with", "在 Redis 中所用 key 的前缀"},
		{"PUBLIC_URL", "url", open, "", link(&c.publicURL, originPattern),
			"http(s)://host[:port], no path, where phones reach us",
			"手机和微信访问本服务的地址 http(s)://域名[:端口]，不带路径"},
		{"ADDR", "addr", open, ":8080", parsed(&c.addr, parseAddr), "host:port to listen on", "监听地址 host:port"},
		{"TICKET_TTL", "ttl", open, "5m", within(&c.ttl, time.ParseDuration, time.Second, time.Second, 720*time.Hour),
			"the life of a QR code, whole seconds from 1s to 720h", "二维码有效期，整秒，1s 至 720h"},
		{"MAX_TICKETS", "max-tickets", open, "100000", within(&c.maxTickets, strconv.Atoi, 1, 1, 1e9),
			"the number of tickets before 503, from 1",
			"同时存在的 ticket 上限，超过则返回 503，最小为 1"},
		{"WECHAT_SCOPE", "scope", open, "snsapi_base", text(&c.scope, `snsapi_(base|userinfo)`),
			"snsapi_base, or snsapi_userinfo for the profile",
			"授权作用域 snsapi_base 或 snsapi_userinfo（获取昵称和头像）"},
		{"QR_RATE", "qr-rate", open, "60", within(&c.qrRate, strconv.Atoi, 1, 0, 1000),
			"QR codes a minute for one client, to 1000; 0: no limit",
			"每个客户端每分钟的二维码数，至多 1000；0 表示不限制"},
		{"TRUSTED_PROXIES", "trusted-proxies", open, "", listed(&c.trusted, netip.ParsePrefix),
			"CIDRs, besides loopback, whose X-Forwarded-For counts",
			"除本机外可信代理的 CIDR，逗号分隔，采用其 X-Forwarded-For"},
		{"PUSH_MAX_SKEW", "push-max-skew", open, "10m", within(&c.maxSkew, time.ParseDuration, 1, 0, 8760*time.Hour),
			"how old or early a push may be, to 8760h; 0: any",
			"推送时间与本机时钟允许的偏差，至多 8760h；0 表示不检查"},
		{"SESSION_TTL", "session-ttl", open, "24h",
			within(&c.sessionTTL, time.ParseDuration, time.Second, time.Minute, 8760*time.Hour),
			"the life of a session, whole seconds from 1m to 8760h", "会话有效期，整秒，1m 至 8760h"},
		{"CONFIRM", "confirm", yesNo, "false", parsed(&c.confirm, parseYesNo),
			"true or false: whether the phone must confirm a scan",
			"“true”或“false”：扫码后是否须在手机上确认"},
		{"FLOWS", "flows", open, "scan,auth", func(value string) bool {
			isList := listed(&c.flows, like(`scan|auth|code`))(value)
			return isList && len(slices.Compact(slices.Sorted(slices.Values(c.flows)))) == len(c.flows)
		},
			"scan, auth, code or some of them, in order", "登录方式 scan、auth、code，按顺序，逗号分隔"},
		{"WECHAT_ACCOUNT", "account", open, "", text(&c.account, `[-0-9A-Za-z_]+`),
			"the account's 微信号, or gh_…, to show its own QR code",
			"公众号的微信号或 gh_…，用于显示其二维码"},
		{"SITE_NAME", "site-name", open, "", text(&c.siteName, `[^\p{Cc}]{0,40}`),
			"what pages call the place to log in to, to 40 characters",
			"页面上显示的网站名称，至多 40 字；不设则为 PUBLIC_URL 的域名"},
		{"ALLOWED_ORIGINS", "allowed-origins", open, "", listed(&c.allowedOrigins, parseOrigin),
			"exact origins of other front ends, comma-separated",
			"其他前端的 origin，须完全一致，逗号分隔"},
		{"WECHAT_VERIFY_FILE", "verify-file", open, "", text(&c.verifyFile, `MP_verify_[0-9A-Za-z]+\.txt`),
			"MP_verify_xxx.txt, the file that proves a domain", "用于验证域名的文件名 MP_verify_xxx.txt"},
		{"TLS_CERT", "tls-cert", open, "", text(&c.tlsCert, `(?s).*`),
			"the file of a certificate chain, for https", "证书链文件，用于 https"},
		{"TLS_KEY", "tls-key", open, "", text(&c.tlsKey, `(?s).*`), "the file of its key", "证书的私钥文件"},
		{"LOG_LEVEL", "log-level", open, "info",
			func(value string) bool { return c.logLevel.UnmarshalText([]byte(value)) == nil },
			"debug, info, warn or error", "日志级别 debug、info、warn 或 error"},
		{"LOG_FORMAT", "log-format", open, "text", text(&c.logFormat, `text|json`), "text or json",
			"日志格式 text 或 json"},
	}
}

// A settingsError has a line for each setting that is wrong.
type settingsError struct {
	language  language
	lines     []string
	isMissing bool // something required is not set
}

func (e *settingsError) Error() string { return strings.Join(e.lines, "\n") }

// when adds a line if settings do not go together.
func (e *settingsError) when(isWrong bool, english, chinese string) {
	if isWrong {
		e.lines = append(e.lines, e.language.choose(english, chinese))
	}
}

// take sets the settings to values, or else to their defaults. It returns nil, or e
// with the lines about what is malformed, or required but not set.
func (e *settingsError) take(settings []setting, values map[string]string, required ...string) error {
	for _, s := range settings {
		value := cmp.Or(values[s.env], s.byDefault)
		isMissing := value == "" && slices.Contains(required, s.env)
		if isMissing || value != "" && !s.set(value) {
			e.lines = append(e.lines, s.complaint(e.language, value))
		}
		e.isMissing = e.isMissing || isMissing
	}
	if len(e.lines) == 0 {
		return nil
	}
	return e
}

// parseConfig reads the settings of a server.
func parseConfig(args []string, getenv func(string) string) (config, error) {
	var c config
	err := c.parse(flag.NewFlagSet("wxscan", flag.ContinueOnError), args, getenv)
	return c, err
}

// parse reads the settings, with flags for them beside those that flags has already.
// Its error is a *settingsError, flag.ErrHelp, or a line about the arguments.
func (c *config) parse(flags *flag.FlagSet, args []string, getenv func(string) string) error {
	settings, wrong := c.settings(), &settingsError{language: languageOf(getenv)}
	flags.BoolVar(&c.demo, "demo", false, "")
	values, err := valuesOf(settings, flags, args, getenv)
	if err != nil {
		return err
	}
	wrong.when(c.demo && values["WECHAT_APPSECRET"] != "",
		"WECHAT_APPSECRET: must not be set with -demo, where anyone can log in as anyone",
		"WECHAT_APPSECRET：不能与 -demo 同用，因为 -demo 时任何人都能以任何身份登录")
	wrong.when(c.demo && values["REDIS_URL"] != "",
		"REDIS_URL: must not be set with -demo, which simulates WeChat for one process",
		"REDIS_URL：不能与 -demo 同用，-demo 只为单个进程模拟微信")
	wrong.when(c.demo && values["TLS_CERT"] != "",
		"TLS_CERT (-tls-cert): must not be set with -demo, which speaks plain http",
		"TLS_CERT (-tls-cert)：不能与 -demo 同用，-demo 只提供 http")
	wrong.when(!c.demo && values["REDIS_URL"] != "" && values["SESSION_SECRET"] == "",
		"SESSION_SECRET: must be set with REDIS_URL, the same on each replica: they check each other's sessions",
		"SESSION_SECRET：使用 REDIS_URL 时必须设置，且各实例相同，"+
			"否则彼此不认对方签发的会话")
	wrong.when((values["TLS_CERT"] == "") != (values["TLS_KEY"] == ""),
		"TLS_CERT (-tls-cert), TLS_KEY (-tls-key): must both be set, or neither",
		"TLS_CERT (-tls-cert)、TLS_KEY (-tls-key)：须同时设置，或都不设置")
	required := []string{"WECHAT_TOKEN", "PUBLIC_URL"}
	switch {
	case c.demo:
		required = nil                // what is not given here is known once it listens
		values["SESSION_SECRET"] = "" // never production's: a demo's sessions must be good for nothing else
		values["WECHAT_APPSECRET"] = "simulated"
		values["WECHAT_APPID"] = cmp.Or(values["WECHAT_APPID"], "wx0123456789abcdef")
		values["WECHAT_TOKEN"] = cmp.Or(values["WECHAT_TOKEN"], "simulated")
		values["WECHAT_ACCOUNT"] = cmp.Or(values["WECHAT_ACCOUNT"], simulatedAccount)
		values["ADDR"] = cmp.Or(values["ADDR"], "127.0.0.1:8080")
	case values["FLOWS"] != string(flowCode):
		required = append(required, "WECHAT_APPID", "WECHAT_APPSECRET")
	case values["WECHAT_AES_KEY"] != "": // flow C alone asks nothing of WeChat, but what is sealed names the appid
		required = append(required, "WECHAT_APPID")
	}
	err = wrong.take(settings, values, required...)
	if c.forgetful = len(c.sessionSecrets) == 0; c.forgetful {
		c.sessionSecrets = []string{rand.Text() + rand.Text()}
	}
	return err
}
