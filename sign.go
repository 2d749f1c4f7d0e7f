package main

import (
	"crypto/rand"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

const signUsage = `wxscan sign: print requests as WeChat makes them, as curl lines: the check of the
interface URL and, for a ticket of flow A or C, the push that logs it in
  -ticket           the ticket, with -openid
  -openid           who is to be logged in
  -code             the six digits of a ticket of flow C
  -event            scan (who follows the account already) or subscribe [scan]
  -addr             ADDR, of a server on this computer [:8080]
  -url              PUBLIC_URL, in place of -addr
  -tls-cert         TLS_CERT: where it is set, PUBLIC_URL is taken too
  -env              a file of lines NAME=value, for what the environment does not set
By environment, as the server's: WECHAT_TOKEN, and WECHAT_AES_KEY with WECHAT_APPID.
`

const signUsageInChinese = `wxscan sign：以 curl 命令的形式打印微信会发来的请求：
接口 URL 的验证，以及使方式 A 或 C 的某个 ticket 登录的推送
  -ticket           ticket，与 -openid 同用
  -openid           以谁的身份登录
  -code             方式 C 的 ticket 的六位数字
  -event            scan（已关注公众号）或 subscribe（扫码后关注）[scan]
  -addr             即 ADDR，服务在本机的监听地址 [:8080]
  -url              即 PUBLIC_URL，代替 -addr
  -tls-cert         即 TLS_CERT，设置了它时也用 PUBLIC_URL
  -env              设置文件，每行 NAME=value，用于环境变量中没有的设置
环境变量须与服务相同：WECHAT_TOKEN，安全模式还有 WECHAT_AES_KEY 和 WECHAT_APPID。
`

// sign prints curl lines that the server takes for WeChat's: the check of the
// interface URL and, for a ticket, the push that logs it in.
func sign(args []string, getenv func(string) string, stdout io.Writer) error {
	var c config
	flags := flag.NewFlagSet("sign", flag.ContinueOnError)
	ticket := flags.String("ticket", "", "")
	openID := flags.String("openid", "", "")
	code := flags.String("code", "", "")
	event := flags.String("event", "scan", "")
	settings := pick(c.settings(), "WECHAT_TOKEN", "WECHAT_AES_KEY", "WECHAT_APPID", "ADDR", "PUBLIC_URL", "TLS_CERT")
	values, err := valuesOf(settings, flags, args, getenv)
	if err != nil {
		return err
	}
	isPublic := values["TLS_CERT"] != ""
	flags.Visit(func(f *flag.Flag) { isPublic = isPublic || f.Name == "url" })
	required, optional := []string{"WECHAT_TOKEN"}, []string{"WECHAT_AES_KEY"}
	if isPublic {
		required = append(required, "PUBLIC_URL")
	} else {
		optional = append(optional, "ADDR")
	}
	if values["WECHAT_AES_KEY"] != "" {
		required = append(required, "WECHAT_APPID") // what is sealed names it
	}
	isSubscribe, isScan := strings.EqualFold(*event, "subscribe"), strings.EqualFold(*event, "scan")
	wrong := &settingsError{language: languageOf(getenv)}
	wrong.when(!isSubscribe && !isScan, fmt.Sprintf("-event: must be scan or subscribe, got %q", *event),
		fmt.Sprintf("-event：应为 scan 或 subscribe，实际为 %q", *event))
	wrong.when((*ticket == "") != (*openID == ""), "-ticket, -openid: must both be given, or neither",
		"-ticket、-openid：须同时给出，或都不给出")
	if err := wrong.take(pick(settings, append(optional, required...)...), values, required...); err != nil {
		return err
	}
	if !isPublic {
		c.publicURL = fromHere(c.addr)
	}
	query := c.signedQuery()
	query.Set("echostr", rand.Text())
	fmt.Fprintf(stdout, "curl -sS -w '\\n' %s\n", shellQuoted(c.interfaceURL()+"?"+query.Encode()))
	if *ticket == "" {
		return nil
	}
	name, key := "SCAN", digest(*ticket).String()
	if isSubscribe {
		name, key = "subscribe", "qrscene_"+key
	}
	query, push, err := c.signedPush(*openID, name, key, "")
	if *code != "" {
		query, push, err = c.signedText(*openID, *code)
	}
	fmt.Fprintf(stdout, "curl -sS -w '\\n' %s -H 'Content-Type: text/xml' --data-binary %s\n",
		shellQuoted(c.interfaceURL()+"?"+query.Encode()), shellQuoted(string(push)))
	return err
}

// pick returns the settings of these names.
func pick(settings []setting, names ...string) []setting {
	return slices.DeleteFunc(slices.Clone(settings), func(s setting) bool { return !slices.Contains(names, s.env) })
}

func shellQuoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
