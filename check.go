package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
)

// maxApart is how far our clock and WeChat's may be apart.
const maxApart = 5 * time.Minute

// command runs a command other than serving. It returns flag.ErrHelp if help is
// what is wanted.
func command(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	switch args[0] {
	case "check":
		return check(ctx, args[1:], getenv, stdout)
	case "sign":
		return sign(args[1:], getenv, stdout)
	case "version":
		return version(stdout)
	case "help":
		return flag.ErrHelp
	}
	return unknown("command", args[0], "check", "sign", "version", "help")
}

// interfaceURL is where WeChat is to send its pushes.
func (c *config) interfaceURL() string { return c.publicURL + "/wechat/message" }

// domain is where the authorize page may send phones back to: a bare host.
func (c *config) domain() string { return site(c.publicURL).Hostname() }

// site returns the scheme and the host of an address, without the rest, where
// secrets may be. It is never nil.
func site(address string) *url.URL {
	u, err := url.Parse(address)
	if err != nil {
		return new(url.URL)
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}
}

// A finding is a line of check's. No argument is a secret; text that somebody
// else has written is quoted, as it may hold anything.
type finding struct {
	mark   string // ✓ or ✗; → before what is to be entered, which cannot be checked
	format string // and an argument that is text: English, and in zh
	args   []any
}

func good(format string, args ...any) finding  { return finding{"✓", format, args} }
func bad(format string, args ...any) finding   { return finding{"✗", format, args} }
func enter(format string, args ...any) finding { return finding{"→", format, args} }

// check walks the set-up, and prints a line a step. It starts no server.
func check(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	isJSON := func(arg string) bool { return arg == "-json" || arg == "--json" }
	asJSON, chinese := slices.ContainsFunc(args, isJSON), strings.HasPrefix(cmp.Or(getenv("LC_ALL"), getenv("LANG")), "zh")
	var verdict error
	report := func(step string, f finding) {
		if f.mark == "✗" {
			verdict = errors.New("check: not everything is in place")
		}
		if chinese {
			f.format = cmp.Or(zh[f.format], f.format)
			for i, arg := range f.args {
				if text, ok := arg.(string); ok {
					f.args[i] = cmp.Or(zh[text], text)
				}
			}
		}
		message := fmt.Sprintf(f.format, f.args...)
		line := []byte(f.mark + " " + message)
		if asJSON {
			line, _ = json.Marshal(object{"step": step, "ok": f.mark != "✗", "message": message})
		}
		fmt.Fprintf(stdout, "%s\n", line)
	}

	c, err := parseConfig(slices.DeleteFunc(slices.Clone(args), isJSON), getenv, io.Discard)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err == nil && c.demo { // one that runs here already
		var listening *net.TCPAddr
		if listening, err = net.ResolveTCPAddr("tcp", c.addr); err == nil {
			c.simulate(listening)
		}
	}
	if err != nil {
		message := err.Error()
		if chinese {
			message = strings.NewReplacer(zhSettings...).Replace(message)
		}
		report("settings", bad("%s", message))
		return verdict
	}
	report("settings", good("the settings are complete and well-formed"))

	w := &wechat{config: c, client: newHTTPClient(), log: slog.New(slog.DiscardHandler), called: func(string, string) {}}
	api := site(c.apiBase)
	if resp, _, err := sendAsWeChat(ctx, w.client, http.MethodGet, c.apiBase+"/", nil); err != nil {
		report("clock", onTheWay(err, api)) // the next steps would say the same
	} else {
		report("clock", clock(resp, api, c.maxSkew))
		patience, cancel := context.WithTimeout(ctx, pushTimeout)
		defer cancel()
		if _, err := w.accessToken(patience); err != nil {
			report("access_token", refusal(err, api))
		} else {
			report("access_token", good("WeChat gives an access token for this appid and appsecret"))
			if _, _, err := w.createQR(ctx, rand.Text(), time.Minute); err != nil {
				report("qr_code", refusal(err, api))
			} else {
				report("qr_code", good("WeChat makes QR codes for this account (flow A)"))
			}
		}
	}
	report("public_url", urlCheck(ctx, w.client, &c))
	public := site(c.publicURL)
	if !local(api) && (local(public) || !slices.Contains([]string{"", "80", "443"}, public.Port())) {
		report("public_port", bad("WeChat pushes to ports 80 and 443 of public addresses alone, and %s is none: flow A hears of no scan", public))
	}
	report("interface", enter("to enter as the interface URL (接口配置信息 URL): %s ; as its Token: the value of WECHAT_TOKEN", c.interfaceURL()))
	if c.aesKey != nil {
		report("safe_mode", enter("to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY"))
	}
	report("authorization", enter("to enter as the authorization domain (网页授权域名), which only a phone can try (flow B): %s", c.domain()))
	return verdict
}

// local tells whether an address is of no use outside this machine or network.
func local(u *url.URL) bool {
	ip, _ := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || ip.IsLoopback() || ip.IsPrivate()
}

func clock(resp *http.Response, api *url.URL, maxSkew time.Duration) finding {
	date, err := http.ParseTime(resp.Header.Get("Date"))
	apart := time.Since(date).Abs()
	switch {
	case err != nil:
		return bad("%s does not tell the time: is that WeChat, or a proxy to it?", api)
	case apart > maxApart || maxSkew > 0 && apart > maxSkew:
		return bad("this computer's clock and WeChat's are %v apart: set it right (timedatectl set-ntp true); PUSH_MAX_SKEW bears %v", apart.Round(time.Minute), maxSkew)
	}
	return good("this computer's clock agrees with WeChat's")
}

// refusal tells what WeChat, or the way to it, has against a call.
func refusal(err error, api *url.URL) finding {
	refused, ok := errors.AsType[*apiError](err)
	switch advice := hint(err); {
	case !ok:
		return onTheWay(err, api)
	case advice == hintIP:
		for _, word := range strings.FieldsFunc(refused.message, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef.:", r) }) {
			if ip, err := netip.ParseAddr(word); err == nil {
				return bad("errcode %d: add %s to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; flow B works without", refused.code, ip.Unmap())
			}
		}
		fallthrough
	case advice != "":
		return bad("errcode %d: %s", refused.code, advice)
	}
	return bad("errcode %d: look it up among WeChat's return codes (全局返回码)", refused.code)
}

// onTheWay tells why a server is not reached, or not understood.
func onTheWay(err error, to *url.URL) finding {
	_, isDNS := errors.AsType[*net.DNSError](err)
	netErr, _ := errors.AsType[net.Error](err)
	badCert, _ := errors.AsType[*tls.CertificateVerificationError](err)
	switch {
	case isDNS:
		return bad("%s: DNS does not know this name: is it spelt right, and this machine online?", to)
	case errors.Is(err, errTimeout), netErr != nil && netErr.Timeout():
		return bad("%s: no answer in time: does a firewall or a security group (安全组) keep the port shut?", to)
	case errors.Is(err, syscall.ECONNREFUSED):
		return bad("%s: nothing answers there (connection refused): the server must be running while check runs, on that port", to)
	case errors.Is(err, http.ErrSchemeMismatch):
		return bad("%s: it speaks http, not https: write http://, or give it a certificate", to)
	case badCert != nil:
		return bad("%s: its TLS certificate is not to be trusted: %q", to, badCert.Err)
	}
	return bad("%s: no usable answer: is that the right address, is a proxy between?", to)
}

// urlCheck does what WeChat does when the interface URL is entered.
func urlCheck(ctx context.Context, client *http.Client, c *config) finding {
	query, echo, us := c.signedQuery(), rand.Text(), site(c.publicURL)
	query.Set("echostr", echo)
	resp, body, err := sendAsWeChat(ctx, client, http.MethodGet, c.interfaceURL()+"?"+query.Encode(), nil)
	if err != nil {
		return onTheWay(err, us)
	}
	answer, status := string(body), resp.StatusCode
	isPage := strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html")
	switch target, err := resp.Location(); {
	case status == http.StatusOK && answer == echo:
		return good("%s answers WeChat's check of the interface URL", us)
	case status/100 == 3 && err == nil: // of the target's query we keep nothing: it holds our signature
		return bad("%s redirects to %q, and WeChat does not follow: make PUBLIC_URL the address that answers itself", us, (&url.URL{Scheme: target.Scheme, Host: target.Host, Path: target.Path}).String())
	case status == http.StatusForbidden && strings.Contains(answer, `"bad_signature"`):
		return bad("%s: wxscan answers there, but has another Token: start it with the same WECHAT_TOKEN", us)
	case status == http.StatusBadRequest && us.Scheme == "http" && strings.Contains(answer, "HTTPS"):
		return bad("%s: it speaks https, not http: write https://", us)
	case isPage && (status == http.StatusOK || status == http.StatusNetworkAuthenticationRequired):
		return bad("%s answers with a web page: a tunnel's warning (ngrok's free plan, localtunnel), which WeChat cannot click away, or another program", us)
	case status >= 500, resp.Header.Get("Ngrok-Error-Code") != "":
		return bad("%s: a proxy or tunnel answers with HTTP %d, but no server behind it: is wxscan running, on the port that it passes on to?", us, status)
	}
	return bad("%s: another program answers, with HTTP %d: does the proxy pass /wechat/ on to wxscan, unchanged?", us, status)
}

// sign prints curl lines that the server takes for WeChat's: the check of the
// interface URL and, for a ticket, the push that logs it in.
func sign(args []string, getenv func(string) string, stdout io.Writer) error {
	flags := flag.NewFlagSet("sign", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	public := flags.Bool("public", false, "")
	ticket := flags.String("ticket", "", "")
	openID := flags.String("openid", "", "")
	event := flags.String("event", "SCAN", "")
	if err := flags.Parse(args); err != nil {
		return badFlag(err, flags)
	}
	c := config{appID: getenv("WECHAT_APPID"), token: getenv("WECHAT_TOKEN"), publicURL: strings.TrimSuffix(getenv("PUBLIC_URL"), "/")}
	eventKey := map[string]string{"SCAN": "wxscan", "subscribe": "qrscene_wxscan"}[*event]
	key := getenv("WECHAT_AES_KEY")
	var keyErr, addrErr error
	if key != "" {
		c.aesKey, keyErr = parseAESKey(key)
	}
	if !*public {
		_, service, err := net.SplitHostPort(cmp.Or(getenv("ADDR"), ":8080"))
		port, portErr := net.LookupPort("tcp", service)
		c.publicURL, addrErr = fmt.Sprint("http://127.0.0.1:", port), cmp.Or(err, portErr)
	}
	for _, setting := range []struct {
		isBad bool
		says  string
	}{
		{flags.NArg() > 0, "unknown argument (wxscan -h lists the flags)"},
		{c.token == "", "WECHAT_TOKEN is not set: it must be the server's; that of wxscan -demo is simulated"},
		{keyErr != nil, "WECHAT_AES_KEY is malformed: it must be the server's"},
		{key != "" && c.appID == "", "WECHAT_APPID is not set: what WECHAT_AES_KEY seals names it"},
		{addrErr != nil, "ADDR has no port: -public takes PUBLIC_URL instead"},
		{c.publicURL == "", "PUBLIC_URL is not set: -public needs it"},
		{eventKey == "", "-event must be SCAN or subscribe"},
		{(*ticket == "") != (*openID == ""), "-ticket and -openid go together, and neither is empty"},
	} {
		if setting.isBad {
			return errors.New("sign: " + setting.says)
		}
	}
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	query := c.signedQuery()
	query.Set("echostr", rand.Text())
	fmt.Fprintf(stdout, "curl -sS -w '\\n' %s\n", quote(c.interfaceURL()+"?"+query.Encode()))
	if *ticket == "" {
		return nil
	}
	query, push, err := c.signedPush(*openID, *event, eventKey, *ticket)
	if err == nil {
		fmt.Fprintf(stdout, "curl -sS -w '\\n' %s -H 'Content-Type: text/xml' --data-binary %s\n", quote(c.interfaceURL()+"?"+query.Encode()), quote(string(push)))
	}
	return err
}

// version prints the version that go build took from git.
func version(stdout io.Writer) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("version: built without build information")
	}
	fmt.Fprintln(stdout, "wxscan", cmp.Or(info.Main.Version, "(devel)"), info.GoVersion)
	return nil
}

// badFlag makes plain what flag.Parse has against the arguments.
func badFlag(err error, flags *flag.FlagSet) error {
	word, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: ")
	if !ok {
		return fmt.Errorf("%w (wxscan -h lists the flags)", err)
	}
	known := []string{"-json"} // of check, which hides it from flags
	flags.VisitAll(func(f *flag.Flag) { known = append(known, "-"+f.Name) })
	return unknown("flag", word, known...)
}

// unknown says which known word was meant, if one is near.
func unknown(kind, word string, known ...string) error {
	nearest := slices.MinFunc(known, func(a, b string) int { return distance(word, a) - distance(word, b) })
	if d := distance(word, nearest); 0 < d && d <= 2 && 2*d <= len(word) {
		return fmt.Errorf("unknown %s %q: did you mean %s?", kind, word, nearest)
	}
	return fmt.Errorf("unknown %s %q (wxscan -h lists them)", kind, word)
}

// distance is the number of bytes to add, drop or change between a and b
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1) // from what was read of a to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// zh has check's lines, and the hints, in Chinese. The arguments keep their order.
var zh = map[string]string{
	"the settings are complete and well-formed":                                                                        "设置齐全，格式正确",
	"WeChat gives an access token for this appid and appsecret":                                                        "微信接受此 appid 和 appsecret，已取得 access token",
	"WeChat makes QR codes for this account (flow A)":                                                                  "此公众号可以生成带参数二维码（方式 A）",
	"this computer's clock agrees with WeChat's":                                                                       "本机时钟与微信一致",
	"%s does not tell the time: is that WeChat, or a proxy to it?":                                                     "%s 的应答没有时间：那是微信或其代理吗？",
	"this computer's clock and WeChat's are %v apart: set it right (timedatectl set-ntp true); PUSH_MAX_SKEW bears %v": "本机时钟与微信相差 %v：请校准（timedatectl set-ntp true）；PUSH_MAX_SKEW 容许 %v",
	"WeChat pushes to ports 80 and 443 of public addresses alone, and %s is none: flow A hears of no scan":             "微信只向公网地址的 80、443 端口推送，而 %s 不是：方式 A 收不到扫码事件",
	"to enter as the interface URL (接口配置信息 URL): %s ; as its Token: the value of WECHAT_TOKEN":                         "请填写接口配置信息：URL 为 %s ，Token 为 WECHAT_TOKEN 的值",
	"to choose and enter there: safe mode (安全模式), as EncodingAESKey the value of WECHAT_AES_KEY":                       "并选择安全模式，EncodingAESKey 为 WECHAT_AES_KEY 的值",
	"to enter as the authorization domain (网页授权域名), which only a phone can try (flow B): %s":                           "请填写网页授权域名（方式 B，只有用手机才能验证）：%s",
	"errcode %d: add %s to the account's IP whitelist: mp.weixin.qq.com, 设置与开发, 基本配置, IP白名单; flow B works without":     "errcode %d：请把 %s 加入公众号的 IP 白名单：mp.weixin.qq.com → 设置与开发 → 基本配置 → IP白名单；方式 B 不受影响",
	"errcode %d: %s": "errcode %d：%s",
	"errcode %d: look it up among WeChat's return codes (全局返回码)":                                                                          "errcode %d：请查微信的全局返回码",
	"%s: DNS does not know this name: is it spelt right, and this machine online?":                                                        "%s：域名无法解析：拼写对吗？本机能上网吗？",
	"%s: no answer in time: does a firewall or a security group (安全组) keep the port shut?":                                                "%s：超时没有应答：端口被防火墙或安全组挡住了吗？",
	"%s: nothing answers there (connection refused): the server must be running while check runs, on that port":                           "%s：没有程序应答（连接被拒绝）：运行 check 时，服务须已在该端口运行",
	"%s: it speaks http, not https: write http://, or give it a certificate":                                                              "%s：那里是 http 而非 https：请改写成 http://，或配置证书",
	"%s: its TLS certificate is not to be trusted: %q":                                                                                    "%s：TLS 证书不可信：%q",
	"%s: no usable answer: is that the right address, is a proxy between?":                                                                "%s：应答无法使用：地址对吗？中间有代理吗？",
	"%s answers WeChat's check of the interface URL":                                                                                      "%s 能通过微信对接口 URL 的验证",
	"%s redirects to %q, and WeChat does not follow: make PUBLIC_URL the address that answers itself":                                     "%s 跳转到 %q，而微信不会跟随：PUBLIC_URL 应为直接应答的地址",
	"%s: wxscan answers there, but has another Token: start it with the same WECHAT_TOKEN":                                                "%s：是 wxscan 在应答，但 Token 不同：请用同一个 WECHAT_TOKEN 启动它",
	"%s: it speaks https, not http: write https://":                                                                                       "%s：那里是 https 而非 http：请改写成 https://",
	"%s answers with a web page: a tunnel's warning (ngrok's free plan, localtunnel), which WeChat cannot click away, or another program": "%s 返回的是网页：内网穿透的提示页（ngrok 免费版、localtunnel，微信无法点过），或是别的程序",
	"%s: a proxy or tunnel answers with HTTP %d, but no server behind it: is wxscan running, on the port that it passes on to?":           "%s：代理或内网穿透返回 HTTP %d，其后没有服务：wxscan 在它转发的端口上运行吗？",
	"%s: another program answers, with HTTP %d: does the proxy pass /wechat/ on to wxscan, unchanged?":                                    "%s：应答的是别的程序（HTTP %d）：代理把 /wechat/ 原样转给 wxscan 了吗？",
	hintBusy:    "微信系统繁忙，请稍后再试",
	hintAppID:   "请把 WECHAT_APPID 设为公众号页面上的 appID",
	hintSecret:  "请把 WECHAT_APPSECRET 设为公众号页面上的 appsecret；它在那里被冻结了吗？",
	hintToken:   "微信拒绝每个 access token：是否有别的程序用此 appid 调用 /cgi-bin/token？",
	hintIP:      "请把本机的公网 IP 加入公众号的 IP 白名单；方式 B 不受影响",
	hintQuota:   "此接口今天的调用次数已用完，北京时间零点恢复",
	hintPace:    "调用太频繁，请稍候",
	hintAccount: "需要已认证的服务号，或测试号",
}

// zhSettings has the commonest words of parseConfig's errors, each with its Chinese.
var zhSettings = []string{
	" is not set: it is ", " 未设置：应为", " is malformed: it is ", " 格式不对：应为",
	"; without an account, try wxscan -demo", "；没有公众号可先试 wxscan -demo",
	" on the account's page (test account: ", "，见公众号页面（测试号：",
	"the appID (wx and letters and digits)", " appID（wx 加字母和数字）",
	"the appsecret (letters and digits)", " appsecret（字母和数字）",
	"the Token (3-32 letters and digits) that you make up and type into the interface configuration (接口配置信息)", "您自定并填入接口配置信息的 Token（3 到 32 个字母和数字）",
	"http(s)://host[:port] without a path, where phones reach us", " http(s)://域名[:端口]，不带路径，即手机和微信访问本服务的地址，如 ngrok 给的地址",
}
